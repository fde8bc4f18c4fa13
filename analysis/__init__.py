"""From run directories to a verdict one can defend: load, compare, plot, report. Reads `outputs/`, deploys nothing."""
