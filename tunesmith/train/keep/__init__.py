"""Against forgetting: terms that hold a model near what it was. A Section each, with `begin(start)`, which gives a
term; at every step the term's `add(step)` adds its gradient to the trained weights' and returns its value."""
