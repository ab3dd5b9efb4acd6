"""The inference box: opens an artifact and generates text, with numpy and TVM's runtime alone."""
