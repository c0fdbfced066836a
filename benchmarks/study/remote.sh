#!/usr/bin/env bash
# The study in slices on a GPU machine that takes a tree of 64 MiB a call, reaches no network, and
# is bare whenever it is new. Run from the top of the tree, here and there.
#
#   here    remote.sh pack PLAN                   .parts/: wheels, images and what is made so far, in
#                                                 parts; each call carries one of them (git ignores it)
#   there   remote.sh place PART                  every part but the last, a call each
#   there   remote.sh slice MINUTES PLAN [PART]   the last part, then a slice of the plan that ends by
#                                                 itself; $OUT has at most 8 files of at most 16 MiB.
#                                                 Without a PART it goes on, on the same machine
#   here    remote.sh merge PLAN FOLDER           takes over what came back from $OUT, writes results
#
# On another machine: merge, pack, and from the first part. STUDY_HOME is where a machine keeps the
# parts, outside the tree; STUDY_DEVICE (cuda) and STUDY_OPTIONS serve a rehearsal on a CPU.
set -euo pipefail

MiB=$((1024 * 1024))
PART_BYTES=$((${STUDY_PART_MIB:-60} * MiB))
TREE_BYTES=$((63 * MiB)) # of 64, with a margin
LEAST_BYTES=$((8 * MiB))
BACK_BYTES=$((16 * MiB - 65536))
BACK_TOTAL=$((${STUDY_BACK_MIB:-62} * MiB)) # four files, beside log, rows and table
MARGIN=45                                   # seconds to bring back in
HOME_THERE=${STUDY_HOME:-/var/tmp/study}

here() { "${PYTHON:-.venv/bin/python}" "$@"; }

wheels() { # what a machine with torch lacks, for its Python
    local names folder=$1
    mkdir -p "$folder"
    [ -z "$(ls "$folder")" ] || return 0
    names=$(here -c 'from importlib.metadata import version as v
print(*(f"{n}=={v(n)}" for n in ("pydantic", "pydantic_core", "annotated-types", "typing-inspection", "typing_extensions")))')
    # shellcheck disable=SC2086
    here -m pip download --quiet --no-deps --only-binary=:all: --python-version "${STUDY_PYTHON:-3.12}" \
        --implementation cp --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        -d "$folder" $names
}

pack() {
    mkdir -p .parts
    local plan=${1:?must name a plan} tree size wheels=.parts/wheels-${STUDY_PYTHON:-3.12}
    git check-ignore -q .parts || { echo "Error: git must ignore .parts/" >&2; exit 2; }
    tree=$(git ls-files -z --cached --others --exclude-standard |
        { xargs -0 -r du -cb 2>/dev/null || true; } | awk '$2 == "total" { sum += $1 } END { print sum + 0 }')
    size=$((TREE_BYTES - tree < PART_BYTES ? TREE_BYTES - tree : PART_BYTES))
    if ((size < LEAST_BYTES)); then
        echo "Error: the tree has $((tree / MiB)) MiB of $((TREE_BYTES / MiB)), which leaves no room for parts. Move" \
            "benchmarks/results out of it until the machine is given back" >&2
        exit 2
    fi
    rm -f .parts/parcel-*
    wheels "$wheels"
    here -m benchmarks.study.parcel pack "$plan" "runs/study/$(basename "$plan" .yaml)" .parts \
        --wheels "$wheels" --bytes "$size"
}

layout() { # the tree as an installed package: mpq.export and mpq.policies lie beside mpq in the tree
    local code=$HOME_THERE/code
    rm -rf "$code" && mkdir -p "$code"
    cp -r mpq benchmarks "$code/"
    touch "$code/benchmarks/__init__.py" # else another package of that name would hide it
    cp -r export policies "$code/mpq/"
    export PYTHONPATH=$HOME_THERE/site:$code PYTHONUNBUFFERED=1
    export MPQ_DATA=$HOME_THERE/data MPQ_CACHE=$HOME_THERE/cache
}

bootstrap() { # wheels out of the parts, before anything that needs them can run
    local tar=$HOME_THERE/all.tar
    ls "$HOME_THERE"/parts/*of* >/dev/null 2>&1 || return 0
    cat "$HOME_THERE"/parts/*of* >"$tar"
    tar -xf "$tar" -C "$HOME_THERE" wheels 2>/dev/null || true
    rm "$tar"
    if ls "$HOME_THERE"/wheels/*.whl >/dev/null 2>&1; then
        python3 -m pip install --quiet --no-index --no-deps --upgrade --target "$HOME_THERE/site" \
            "$HOME_THERE"/wheels/*.whl
    fi
}

place() { # in plain shell: nothing is installed there yet
    local part=${1:?must name a part} name stream number count before
    name=$(basename "$part")
    [[ $name =~ ^([a-z]+-[0-9a-f]{12})\.([0-9][0-9])of([0-9][0-9])$ && -f $part ]] ||
        { echo "Error: $part must be a part that pack wrote, but is none" >&2; exit 2; }
    stream=${BASH_REMATCH[1]} number=$((10#${BASH_REMATCH[2]})) count=${BASH_REMATCH[3]}
    before=$HOME_THERE/parts/$(printf '%s.%02dof%s' "$stream" $((number - 1)) "$count")
    if ((number > 1)) && [ ! -f "$before" ]; then
        echo "Error: $name needs $(basename "$before") in $HOME_THERE/parts, which is not there: this is" \
            "another machine than the one that took it. Begin with part 01" >&2
        exit 2
    fi
    ((number > 1)) || rm -rf "$HOME_THERE/parts"
    mkdir -p "$HOME_THERE/parts"
    cp "$part" "$HOME_THERE/parts/"
    python3 -c "import sys, torch; print('Python', sys.version.split()[0], 'torch', torch.__version__, 'CUDA', torch.cuda.is_available())" 2>&1 | tail -n 1 || true
    echo "$name is in $HOME_THERE/parts"
}

slice() {
    local minutes=${1:?must be minutes} plan=${2:?must name a plan} part=${3:-} name left code=0 begun=$SECONDS
    : "${OUT:?must name the folder whose files come back}"
    name=$(basename "$plan" .yaml)
    [[ ${STUDY_OPTIONS:-} != *--rehearse* ]] || name=$name-rehearsal
    [ -z "$part" ] || place "$part"
    bootstrap
    layout
    python3 -m benchmarks.study.parcel open "$HOME_THERE/parts" "$HOME_THERE"
    mkdir -p "$HOME_THERE/runs/$name"
    (cd "$HOME_THERE" && python3 -c "import benchmarks.study.work") # the first import takes long: not of the slice
    left=$((minutes * 60 - (SECONDS - begun) - MARGIN))
    echo "slice of $plan: $left seconds of work"
    # shellcheck disable=SC2086
    (cd "$HOME_THERE" && timeout --signal=INT --kill-after=15 $((left > 0 ? left + 20 : 1)) \
        python3 -m benchmarks.study "$plan" --device "${STUDY_DEVICE:-cuda}" --any-code \
        --runs "runs/$name" -o "results/$name" \
        --time-limit "$(awk -v s="$left" 'BEGIN { print (s > 0 ? s / 60 : 0) }')" \
        ${STUDY_OPTIONS:-} 2>&1) | tee "$OUT/log.txt" || code=${PIPESTATUS[0]}
    cp "$HOME_THERE/results/$name/rows.csv" "$HOME_THERE/results/$name/table.md" "$OUT/" 2>/dev/null || true
    python3 -m benchmarks.study.parcel bring "$HOME_THERE/runs/$name" "$OUT" \
        --bytes "$BACK_BYTES" --total "$BACK_TOTAL"
    case $code in
        0) echo "all of $plan is made" ;;
        3 | 124 | 137) echo "the time is up; goes on with: remote.sh slice $minutes $plan" ;;
        *) exit "$code" ;;
    esac
}

merge() {
    local plan=${1:?must name a plan} folder=${2:?must name what came back} name
    name=$(basename "$plan" .yaml)
    here -m benchmarks.study.parcel merge "$folder" "runs/study/$name"
    # shellcheck disable=SC2086
    here -m benchmarks.study "$plan" --runs "runs/study/$name" --any-code --time-limit 0 ${STUDY_OPTIONS:-} || [ $? = 3 ]
}

case ${1:-} in
    pack | place | slice | merge) "$@" ;;
    *) sed -n '2,17s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
