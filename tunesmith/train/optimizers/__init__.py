"""Optimizers: what turns gradients into steps. A Section each (`sections.py`), with `build(groups, rate)`."""
