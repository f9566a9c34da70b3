"""Ways for several ranks to train one model. `kinds.py` has their sections, the other files what each builds;
`alone.Alone` says what the loop wants of them, and is it for one rank."""
