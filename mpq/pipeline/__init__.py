"""The verbs over files: what each command does, as a function that a script can call.

`subject` opens what a command works on; `analyzing`, `quantizing`, `exporting` and `training` are
the stages. They read and write the files of a run folder and call the library for the rest.
"""
