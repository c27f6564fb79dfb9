"""The paper's ablations: grids of training runs, their evaluation, and one table and chart of it (``apt.ablate``)."""
