"""PyTorch's own RPC suites, from the installed wheel, on our ranks and under sampled faults.

Their tests are programs by the authors of the protocol, not by us. None of their classes is edited
or copied: torch generates them, with our fixture in the place of its own.
"""
