"""Which layers of a graph can have 8 bits: measured group by group, and written into ``conf/``."""
