"""The main branch's forward."""
