"""The sections of the report page, each made from the files of a run."""
