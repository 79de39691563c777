"""The data sets that go by a name (`data.DATASETS`), for whoever reads a study file: no torch here."""

DATASET_NAMES = ("digits", "digits16")
