"""Training methods, one file each.

A method is a Section with `encode(row, renderer)`, which makes tokens and loss weights of a row, `size`,
by which a step's loss is divided, and `loss(forward, batch)`, the sum that is divided.
"""
