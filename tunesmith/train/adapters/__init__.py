"""What is trained of a model, a file for each kind: a Section with `attach(model)`."""
