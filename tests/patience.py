"""How long tests wait for what must come."""

#: Seconds, far beyond what anything takes: only a hang reaches them. A machine with cold disks and other guests
#: needed five minutes for a launch that takes twenty seconds elsewhere.
PATIENCE_S = 600.0
