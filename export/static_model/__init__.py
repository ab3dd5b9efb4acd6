"""The model as a torch module in which every shape is fixed."""
