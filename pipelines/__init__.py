"""The front door: command line, recipes, the stages, tracking, report and submission."""
