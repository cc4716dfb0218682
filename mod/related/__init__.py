"""The other systems of the field, each in a file of its own, by one interface (base.py). The method imports none.

world.py puts a run of any of them together, on streams that may be harder than the core's (data.py).
"""
