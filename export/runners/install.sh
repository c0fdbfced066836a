#!/usr/bin/env bash
# install.sh FOLDER NAME: a runtime for `mpq portability`, below FOLDER and nowhere else.
# NAME: node, web, openvino, arm64, or a version of onnxruntime such as 1.23.2.
set -euo pipefail
mkdir -p "$1"
home=$(cd "$1" && pwd)
name=$2
python=${PYTHON:-python3}

npm_package() {
  mkdir -p "$home/node"
  # Its own script would fetch libraries for GPUs.
  npm install --ignore-scripts --no-fund --no-audit --prefix "$home/node" "$1"
}

environment() {
  "$python" -m venv "$home/$1"
  "$home/$1/bin/pip" install --quiet "${@:2}"
}

# An ARM Python of Debian beside qemu's user mode emulation, all of it unpacked, none installed.
arm64() {
  command -v apt-get dpkg-deb >/dev/null || { echo "arm64 needs apt-get (Debian, Ubuntu)" >&2; exit 1; }
  local apt=$home/arm64/apt
  mkdir -p "$apt"/{state/lists/partial,cache/archives/partial} "$home/arm64"/{root,qemu,site,wheels}
  touch "$apt/state/status"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie main" >"$apt/sources.list"
  cat >"$apt/apt.conf" <<CONF
Dir::State "$apt/state";
Dir::State::status "$apt/state/status";
Dir::Cache "$apt/cache";
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "-";
Dir::Etc::main "-";
APT::Architecture "amd64";
APT::Architectures { "amd64"; "arm64"; };
APT::Install-Recommends "false";
APT::Sandbox::User "root";
CONF
  export APT_CONFIG=$apt/apt.conf
  apt-get update -qq
  apt-get install -qq -y -d qemu-user:amd64 python3.13-minimal:arm64 libpython3.13-stdlib:arm64 libstdc++6:arm64 >/dev/null
  for package in "$apt"/cache/archives/*_arm64.deb; do dpkg-deb -x "$package" "$home/arm64/root"; done
  dpkg-deb -x "$apt"/cache/archives/qemu-user_*_amd64.deb "$home/arm64/qemu"
  ln -sfn usr/lib "$home/arm64/root/lib"
  # The version at hand: the reference walks the graph that it makes.
  local version
  version=$("$python" -c 'import onnxruntime; print(onnxruntime.__version__)')
  "$python" -m pip download --quiet --dest "$home/arm64/wheels" --only-binary=:all: \
    --python-version 3.13 --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
    --platform manylinux2014_aarch64 "onnxruntime==$version" numpy
  for wheel in "$home"/arm64/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$home/arm64/site"; done
}

case $name in
  node) npm_package onnxruntime-node@1.30.0 ;;
  web) npm_package onnxruntime-web@1.30.0 ;;
  openvino) environment openvino openvino numpy ;;
  arm64) arm64 ;;
  1.*) environment "onnxruntime-$name" "onnxruntime==$name" numpy ;;
  *) echo "no runtime $name: node, web, openvino, arm64 or a version of onnxruntime" >&2; exit 2 ;;
esac
