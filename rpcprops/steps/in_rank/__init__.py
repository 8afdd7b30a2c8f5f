"""The functions that ranks run for each kind of step, in plain torch, named like the step's `op`.

The function takes the name of the call, the names of the ranks, and the step's fields by name, all
as plain values. It returns what the step shows. Next to it stand the functions that ranks call on
each other for it. A script of a failure contains the source of these functions, word for word, so
these modules use no type of ours.
"""
