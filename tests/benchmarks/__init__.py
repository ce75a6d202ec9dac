"""The project's benchmark: what per-sample quantities cost, relative to the plain backward pass, here and elsewhere.

Run ``make benchmark``, or a part: ``cd tests && python -m benchmarks --workload W1 --quantity Q2 --repeats 5``.

======================= =============================================================================================
`benchmarks.workloads`  models and batches
`benchmarks.quantities` what is asked for, and the same from plain rows: the reference, and what users of peers write
`benchmarks.engines`    this library's engines, and every peer: how to get a quantity from each
`benchmarks.measure`    time in pairs with the plain pass, and peak memory
`benchmarks.case`       one case in a process of its own
`benchmarks.plan`       which cases there are, and running them
`benchmarks.report`     table and plots
======================= =============================================================================================
"""
