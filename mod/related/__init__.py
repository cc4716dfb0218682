"""The other systems of the field, each in a file of its own, by one interface (base.py). The method imports none.

Each stands alone and is tested; they are not yet trained side by side.
"""
