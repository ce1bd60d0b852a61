"""Pictures and tables: predictions painted over images (``overlays``), training curves (``curves``, extra: viz), and
tables of scores (``tables``).

Importing this package loads none of them.
"""
