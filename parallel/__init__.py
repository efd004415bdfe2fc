"""Model families as tables, and how their tensors are split. The lowest room: it imports no other."""
