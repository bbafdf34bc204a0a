"""All checks and all messages: what may go together, said before anything is launched.

Every function takes native arrays (interop.native) and raises ValueError for shapes and values, TypeError for dtypes
and for mixed libraries and devices, LayoutMismatchError and PageTableError for what their names say. A message names
the argument, the rule with its numbers, what came, and what to do. NumPy and CuPy arrays share the attributes that are
read here (shape, dtype, strides), so nothing here imports CuPy.
"""
