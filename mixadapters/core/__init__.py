"""The mixture core: adapters, banks, routings, and the context of one forward."""
