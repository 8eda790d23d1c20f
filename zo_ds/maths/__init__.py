"""Pure functions of seeds, losses and steps: noise, estimators, the update rule, schedules. Imports torch only."""
