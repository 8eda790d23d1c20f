# Sourced by the scripts here and in tools/: makes .venv once, installs pinned packages, activates it.
#   PYTHON   interpreter to use (default python3)
#   EXTRAS   extras of zo_ds to install (default none)
# A CUDA (or any) torch of a supported version that the interpreter already has is kept; otherwise torch is installed.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
python="${PYTHON:-python3}"
extras="${EXTRAS:-}"

command -v "$python" >/dev/null || { echo "zo_ds: no $python here; set PYTHON to a Python 3.10-3.12" >&2; exit 4; }
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' ||
  { echo "zo_ds: $("$python" --version) is not supported; set PYTHON to a Python 3.10-3.12" >&2; exit 4; }

wanted="$(cat "$root/constraints.txt" "$root/setup.cfg" "$root/pyproject.toml" | cksum)"
if [ "$(cat "$venv/.zo_ds-installed-$extras" 2>/dev/null)" != "$wanted" ]; then
  echo "zo_ds: setting up $venv (once)"
  supported='import torch; v = tuple(map(int, torch.__version__.split(".")[:2])); raise SystemExit(not (2, 11) <= v <= (2, 13))'
  if [ ! -x "$venv/bin/python" ]; then
    site=""
    ! "$python" -c "$supported" 2>/dev/null || site="--system-site-packages"
    "$python" -m venv $site "$venv" ||
      { rm -rf "$venv"; echo "zo_ds: cannot make $venv; install the venv module (Debian: python3-venv)" >&2; exit 4; }
  fi
  install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$pins" "$@"; }
  pins="$root/constraints.txt"
  if "$venv/bin/python" -c "$supported" 2>/dev/null; then
    echo "zo_ds: keeping torch $("$venv/bin/python" -c 'import torch; print(torch.__version__)')"
    pins="$venv/constraints.txt"
    grep -v '^torch==' "$root/constraints.txt" >"$pins"
  else
    install torch
  fi
  # DeepSpeed's own operators are not needed, and building them would need a compiler.
  DS_BUILD_OPS=0 install -e "$root${extras:+[$extras]}"
  # What has the extras also has the rest.
  echo "$wanted" | tee "$venv/.zo_ds-installed-$extras" >"$venv/.zo_ds-installed-"
fi
. "$venv/bin/activate"
# Without an accelerator DeepSpeed would probe and warn in every process.
python -c 'import sys, torch; sys.exit(not torch.accelerator.is_available())' || export DS_ACCELERATOR=cpu
