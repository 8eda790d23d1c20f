"""The loop around the engine: data -> step -> metrics, evaluations, results; and what is done with a finished run."""
