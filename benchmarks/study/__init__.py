"""The study: a plan of teachers, students and rows, made stage by stage, with results that stay.

    python -m benchmarks.study cifar10-resnet20 --time-limit 60
    python -m benchmarks.study check benchmarks/results/cifar10-resnet20

It is also the example of mpq as a library for a long piece of work: everything below is public
functions of mpq, called from plain Python.

- `plan`: a study as a YAML file (`plans/`), checked as a whole
- `stages`: from a plan to its stages in order, each with the key of all that it depends on
- `shelf`: a stage's folder: begun, gone on with, finished once
- `clock`: the time limit
- `work`: one stage after another
- `speed`: the time of an epoch of each network, before anything long begins
- `networks`: float networks, read or trained
- `quantized`: a row of the table, and the file that it is judged on
- `results`: rows, table, curves and files; `check`: all of it measured again
- `remote.sh`: the same in slices on a GPU machine that takes a tree of 64 MiB a call
- `parcel`: what travels there and back
"""
