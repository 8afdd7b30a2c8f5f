"""PyTorch's own RPC suites, out of the installed wheel, on our ranks and under sampled faults.

Their tests are programs that nobody here wrote, by the people who wrote the protocol. No class of
theirs is edited or copied: torch generates them, with our fixture where its own would be.
"""
