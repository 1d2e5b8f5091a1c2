#!/bin/sh
# Builds the image and, from it, critic.sif; beside that: critic.sif.json (what it is) and
# critic.sif.cdx.json (every package in it). Needs podman or docker, and apptainer.
set -eu

usage() {
  cat <<'END'
containers/build.sh [OPTIONS]

  --variant NAME     which build of torch: `cuda`, the one that package indexes have by default;
                     `cpu`, `cu126`, ... where --find-links or pip's variables lead to one
  --find-links DIR   a folder of wheels to look into as well
  --base IMAGE       in place of debian:bookworm-slim; any Debian 12
  --ca FILE          certificates that pip trusts, where the network has some of its own
  --name NAME        of the image (critic)
  --out FILE         the SIF (critic.sif)
  --image-only       no SIF
  --no-cache         every layer anew, with Debian's packages of today
  --gzip             a SIF for kernels that cannot read zstd: larger, and slower to start
  --sandbox          a folder in place of the SIF, for tests on this machine: nothing is compressed

PIP_INDEX_URL and PIP_EXTRA_INDEX_URL hold in the build too. ENGINE=podman|docker chooses the engine.
END
}

fail() {
  echo "error: $*" >&2
  exit 1
}

say() { echo "== $*" >&2; }

started=$(date +%s)
variant=cuda wheels='' base='' ca='' name=critic out=critic.sif sif=yes compression=zstd cache=yes
while [ $# -gt 0 ]; do
  case $1 in
  --image-only) sif=no ;;
  --gzip) compression=gzip ;;
  --sandbox) compression=none ;;
  --no-cache) cache=no ;;
  -h | --help)
    usage
    exit
    ;;
  --variant | --find-links | --base | --ca | --name | --out)
    [ $# -ge 2 ] || fail "$1 needs a value"
    case $1 in
    --variant) variant=$2 ;;
    --find-links) wheels=$2 ;;
    --base) base=$2 ;;
    --ca) ca=$2 ;;
    --name) name=$2 ;;
    --out) out=$2 ;;
    esac
    shift
    ;;
  *)
    usage >&2
    fail "no option '$1'"
    ;;
  esac
  shift
done
[ -z "$wheels" ] || [ -d "$wheels" ] || fail "--find-links $wheels: no such folder"
[ -z "$ca" ] || [ -f "$ca" ] || fail "--ca $ca: no such file"
[ -d "$(dirname "$out")" ] || fail "--out $out: its folder does not exist"
out=$(cd "$(dirname "$out")" && pwd)/$(basename "$out")
[ -z "$wheels" ] || wheels=$(cd "$wheels" && pwd)
[ -z "$ca" ] || ca=$(cd "$(dirname "$ca")" && pwd)/$(basename "$ca")

# Tools

engine=
for candidate in ${ENGINE:-podman docker}; do
  # docker's client is often there without an engine behind it
  if "$candidate" info >/dev/null 2>&1; then
    engine=$candidate
    break
  fi
done
[ -n "$engine" ] || fail "no container engine answers (tried: ${ENGINE:-podman, docker}), and one builds the image.
  On Debian: apt install podman uidmap. For docker: is its service running, are you in its group?
  Where neither can be had, build on another machine; a SIF runs wherever Apptainer does."
if [ $sif = yes ]; then
  command -v apptainer >/dev/null || fail "apptainer is not installed, and it makes the SIF from the image.
  Clusters often have it as a module (module load apptainer); else see its project's packages.
  With --image-only the image alone is built."
fi
command -v git >/dev/null || fail "git is not installed, and it tells the commit that the image is labelled with."

# The commit, marked where something that goes into the image differs from it

cd "$(dirname "$0")/.."
commit=$(git rev-parse HEAD) || fail "$PWD: no checkout of git, so the image's commit is not known"
changes=$(git status --porcelain -- Dockerfile .dockerignore constraints.txt pyproject.toml \
  LICENSE configs containers job slurm)
if [ -n "$changes" ]; then
  say "uncommitted changes; the image is labelled so:"
  echo "$changes" >&2
  commit=$commit-dirty
fi
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' job/__init__.py)
torch=$(grep '^torch==' constraints.txt) || fail "constraints.txt pins no torch"
[ "$variant" = cuda ] || torch=$torch+$variant

# The image

say "image $name: version $version, commit $commit, $torch ($variant), with $engine"
set -- --build-arg "TORCH=$torch" --build-arg "VERSION=$version" --build-arg "COMMIT=$commit"
case $variant in
cuda | cpu) ;;
*) set -- "$@" --build-arg CONSTRAINTS=constraints.txt ;;
esac
[ $cache = yes ] || set -- "$@" --no-cache
[ -z "$base" ] || set -- "$@" --build-arg "BASE=$base"
[ -z "$wheels" ] || set -- "$@" --build-context "wheels=$wheels"
[ -z "$ca" ] || set -- "$@" --secret "id=ca,src=$ca"
[ -z "${PIP_INDEX_URL:-}" ] || set -- "$@" --build-arg "PIP_INDEX_URL=$PIP_INDEX_URL"
[ -z "${PIP_EXTRA_INDEX_URL:-}" ] ||
  set -- "$@" --build-arg "PIP_EXTRA_INDEX_URL=$PIP_EXTRA_INDEX_URL"
"$engine" build "$@" --tag "$name" . >&2 || fail "$engine build failed, see above.
  No matching torch? The default index has the CUDA build alone; give --find-links or
  PIP_EXTRA_INDEX_URL for another --variant."

inside() { "$engine" run --rm -i --network none --entrypoint /opt/venv/bin/python "$name" "$@"; }

cuda=$(inside -c 'import torch; print(torch.version.cuda or "")') || fail "torch cannot be imported"
case $variant:$cuda in
cuda: | cu*:) fail "--variant $variant, but the torch that was found is for CPUs; a folder of
  --find-links with a CPU wheel comes before the index" ;;
cpu:?*) fail "--variant cpu, but the torch that was found is for CUDA $cuda" ;;
esac
image=$("$engine" image inspect --format '{{.Id}}' "$name")
image_bytes=$("$engine" image inspect --format '{{.Size}}' "$name")
packages=$(inside -m pip --no-cache-dir list --format freeze | sha256sum | cut -d ' ' -f 1)
inside - <containers/contents.py >"$out.cdx.json"

# The SIF

sif_bytes=null sif_sha256=null
if [ $sif = yes ]; then
  scratch=$(mktemp -d "$out.XXXXXX")
  trap 'rm -rf "$scratch"' EXIT
  trap 'exit 1' HUP INT TERM
  say "archive of $image"
  if [ "$engine" = podman ]; then # of this format apptainer need not compress each layer to read it
    archive=oci-archive
    podman save --quiet --uncompressed --format oci-archive --output "$scratch/image.tar" "$name"
  else
    archive=docker-archive
    docker save --output "$scratch/image.tar" "$name"
  fi || fail "cannot write the image's archive beside $out: is the disk full?"
  say "SIF $out"
  set -- --build-arg "BOOTSTRAP=$archive" --build-arg "FROM=$scratch/image.tar"
  case $compression in
  zstd) set -- "$@" --mksquashfs-args '-comp zstd -Xcompression-level 3' ;;
  none) set -- "$@" --sandbox ;;
  esac
  # tested as it will run, after it is built
  apptainer build --notest "$@" "$scratch/critic.sif" containers/critic.def >&2 ||
    fail "apptainer build failed, see above; it unpacks the image in \$APPTAINER_TMPDIR or /tmp"
  apptainer test --containall "$scratch/critic.sif" >&2 || fail "the SIF's own test failed, see above"
  if [ $compression = none ]; then
    rm -rf "$out"
    mv "$scratch/critic.sif" "$out"
  else
    mv -f "$scratch/critic.sif" "$out"
    sif_bytes=$(wc -c <"$out")
    sif_sha256=\"$(sha256sum "$out" | cut -d ' ' -f 1)\"
  fi
fi

cat >"$out.json" <<END
{
  "version": "$version",
  "commit": "$commit",
  "variant": "$variant",
  "torch": "$torch",
  "cuda": "$cuda",
  "image": "$image",
  "image_bytes": $image_bytes,
  "sif_bytes": $sif_bytes,
  "sif_sha256": $sif_sha256,
  "packages_sha256": "$packages",
  "seconds": $(($(date +%s) - started))
}
END
say "done in $(($(date +%s) - started)) s:"
cat "$out.json"
