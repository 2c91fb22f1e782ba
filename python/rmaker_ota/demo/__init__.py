"""The main job on one machine with real parts: ``rmaker-ota demo``.

======== ======================================================================================
node     the firmware: a small application of the public API, run as a process of its own
proxy    a TCP proxy between node and image server that can cut a connection in the middle
world    broker, job service, proxy and node, started and always ended again; the three scenarios
chips    the fourth: two simulated chips at serial ports, updated side by side
show     what a person sees while they run
======== ======================================================================================
"""
