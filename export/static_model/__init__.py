"""The model as a torch module whose every shape is fixed."""
