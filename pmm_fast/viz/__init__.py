"""Pictures and tables: overlays and grids (``overlays``, ``comparison``), predictions (``predictions``), matrices of
classes (``matrices``), memory activation maps (``activation``), t-SNE (``embedding``, extra: viz), training curves
(``curves``, extra: viz), tables (``tables``), and the page that gathers them (``report``).

Importing this package loads none of them.
"""
