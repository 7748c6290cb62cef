"""How long a sequence, and how many references, a memory holds."""
