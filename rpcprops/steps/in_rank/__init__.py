"""What a rank does for each kind of step: one function of plain torch, named as the step's `op`.

The function takes the name of the call, the names of the ranks, and the step's fields by name, all
of them plain values; it returns what the step shows. Beside it stand the functions that ranks call
on each other for it. A script of a failure holds the source of these functions, word for word, so
nothing in these modules uses a type of ours.
"""
