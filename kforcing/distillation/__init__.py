"""Training signals: teachers that make targets, and the losses that compare a student with them.

teachers.py   `ARTeacher` and `StudentTeacher`: windows and their noise → target tokens
losses.py     sums of losses over tokens: negative log-likelihood, and KL divergence from the teacher's distributions
steps.py      the loss of one micro-batch of rolled-out windows, or of token blocks
text.py       the loss of one micro-batch of text, whose labels come from the AR model inside the student
self_text.py  text that an AR model writes itself, to train its students on
"""
