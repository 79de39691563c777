"""Published EDM checkpoints: pickles that carry source code, read as plain data; nothing in them is run.

Python's own unpickler calls what a file names. Here the instructions of a pickle (listed by `pickletools`)
are followed by a small machine that has nothing to call: a global is a name from a short list and stands
for a record of plain data, everything else is refused by its name. What the machine reads costs memory in
proportion to the file: counts, sizes and strides are checked before anything is made from them.

Two rules for the source text that each EDM object carries. It is dropped unread but for one check: a
text that does not define the class it comes with was not written by EDM, and the file is refused. And a
network must be complete without it: the arguments it was built with and all of its layers.

Each module builds on those before it: `records`, `machine`, `tensors`, `names`, `checkpoint`.
"""

from bdense_core.edm.checkpoint import EDMCheckpoint, read_edm_pickle

__all__ = ["EDMCheckpoint", "read_edm_pickle"]
