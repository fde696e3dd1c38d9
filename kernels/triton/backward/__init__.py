"""The main branch's backward."""
