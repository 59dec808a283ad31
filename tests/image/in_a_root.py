"""`python -m tests.image.in_a_root` builds Dockerfile.cuda and tests the image without Docker.

FROM is a clean root made by debootstrap; each COPY and RUN is an overlayfs layer on top of the
earlier ones. Then the entrypoint is started like the first process of a container, with a network
of its own. It must answer `POST /generate` and the image's HEALTHCHECK, refuse a second start, and
exit with 0.

It needs Linux, root, debootstrap, and access to Debian's and Python's packages. The pip settings of
this machine are used, and so is the build of torch that they prefer. The host is only read:
everything is mounted in a namespace that ends with this process, below one temporary folder.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Template
from urllib.parse import urlparse

from tests.image.dockerfile import ROOT, Instruction, Stage, read_stages

_FOLDER = "SKIFF_IMAGE_FOLDER"
"""Variable with the folder for layers. It is set for the process inside the namespace."""
_TOOLS = ("debootstrap", "ip", "mount", "nsenter", "unshare")
_START_S, _STOP_S = 300, 60
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ASK = """
import urllib.request
body = b'{"inputs":"The capital of France is","parameters":{"max_new_tokens":6}}'
asked = urllib.request.Request("http://127.0.0.1:80/generate", body)
asked.add_header("Content-Type", "application/json")
print(urllib.request.urlopen(asked, timeout=60).read().decode())
"""


@dataclass(frozen=True, slots=True)
class Image:
    """A stage after some of its instructions. The first layer is the lowest."""

    layers: tuple[Path, ...]
    workdir: str = "/"
    env: dict[str, str] = field(default_factory=lambda: {"PATH": _PATH})


class Builder:
    """Builds the stages of a Dockerfile as layers in one folder."""

    def __init__(self, folder: Path, build_args: dict[str, str]):
        self._folder = folder
        self._build_args = build_args
        self._built: dict[str, Image] = {}

    def build(self, stages: list[Stage]) -> Image:
        for stage in stages:
            image = self._built.get(stage.base) or self._debootstrap(stage.base)
            arguments: dict[str, str] = {}
            for step in stage.instructions:
                image = self._after(step, image, arguments)
            self._built[stage.name or ""] = image
        return image

    def _debootstrap(self, image: str) -> Image:
        suite = image.partition(":")[2].partition("-")[0]
        layer = self.new_folder()
        with _timed(layer, f"FROM {image}"):
            command = ["debootstrap", "--variant=minbase", suite, str(layer)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            # As in Debian's image: apt does not keep the packages that it downloaded.
            clean = 'DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb"; };\n'
            (layer / "etc/apt/apt.conf.d/docker-clean").write_text(clean)
        return Image((layer,))

    def _after(self, step: Instruction, image: Image, arguments: dict[str, str]) -> Image:
        match step.name:
            case "ENV":
                pairs = (word.partition("=")[::2] for word in step.words)
                env = {name: Template(value).substitute(image.env) for name, value in pairs}
                return replace(image, env=image.env | env)
            case "ARG":
                name, _, default = step.words[0].partition("=")
                arguments[name] = self._build_args.get(name, default)
            case "WORKDIR":
                image = replace(image, workdir=step.words[0])
                folder = Path(step.words[0].lstrip("/"))
                return self._layered(
                    image, step, lambda root: (root / folder).mkdir(parents=True, exist_ok=True)
                )
            case "COPY":
                return self._layered(image, step, lambda root: self._copy(step, root, image))
            case "RUN":
                env = {name: value for name, value in arguments.items() if value}
                running = replace(image, env=image.env | env)
                command = ["/bin/sh", "-c", step.words[0]]
                return self._layered(image, step, lambda root: in_root(root, running, command))
        return image

    def _layered(self, image: Image, step: Instruction, work: Callable[[Path], object]) -> Image:
        layer = self.new_folder()
        what = f"{step.name} {' '.join(step.words)}"
        with _timed(layer, what), self.mounted(image, layer) as root:
            work(root)
        return replace(image, layers=(*image.layers, layer))

    def _copy(self, step: Instruction, root: Path, image: Image) -> None:
        *sources, target = step.words
        into = root / os.path.join(image.workdir, target).lstrip("/")
        stage = step.flags.get("from")
        if stage is None:
            _copy_to(into, [ROOT / source for source in sources], target)
            return
        with self.mounted(self._built[stage], self.new_folder()) as other:
            _copy_to(into, [other / source.lstrip("/") for source in sources], target)

    @contextmanager
    def mounted(self, image: Image, upper: Path) -> Iterator[Path]:
        """Mount an image and yield its root folder. Writes go to `upper`."""
        root, work = self.new_folder(), self.new_folder()
        lower = ":".join(str(layer) for layer in reversed(image.layers))
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        _mount("-t", "overlay", "-o", options, "overlay", root)
        try:
            yield root
        finally:
            subprocess.run(["umount", "--recursive", root], check=True)

    def new_folder(self) -> Path:
        """Make a folder with a short name: all names of an overlay's layers must fit in a page."""
        folder = self._folder / str(len(list(self._folder.iterdir())))
        folder.mkdir()
        return folder


def in_root(root: Path, image: Image, command: list[str]) -> None:
    """Run a command in a root folder, with the host's devices, name resolution and pip settings."""
    settings, places = _pip_settings()
    _mount("-t", "proc", "proc", root / "proc")
    _mount("--rbind", "/dev", root / "dev")
    for place, inside in [*places.items(), (Path("/etc/resolv.conf"), "/etc/resolv.conf")]:
        _put_in(root, place, inside)
    ended = subprocess.run(
        _chroot(root, image.workdir, command),
        env=settings | image.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if ended.returncode != 0:
        sys.exit(f"{ended.stdout[-4000:]}\nexit code {ended.returncode}: {' '.join(command)}")


def serve(root: Path, stage: Stage, image: Image) -> None:
    """Start the entrypoint, send a request, try to start it again, and stop it."""
    entrypoint = stage.all("ENTRYPOINT")[0].words
    health = stage.all("HEALTHCHECK")[0].words
    _mount("--rbind", "/dev", root / "dev")
    script = 'ip link set lo up && exec "$@"'
    apart = ["unshare", "--net", "--pid", "--fork", "--kill-child", f"--mount-proc={root}/proc"]
    with subprocess.Popen(
        [*apart, "sh", "-c", script, "sh", *_chroot(root, image.workdir, entrypoint)],
        env=os.environ | image.env,
    ) as server:
        try:
            started = time.perf_counter()
            first = _only_child(server.pid)

            def inside(command: list[str]) -> subprocess.CompletedProcess[str]:
                enter = ["nsenter", "--target", str(first), "--net", "--pid", "--mount"]
                return subprocess.run(
                    [*enter, *_chroot(root, image.workdir, command)],
                    env=image.env,
                    text=True,
                    capture_output=True,
                    timeout=_START_S,
                )

            while inside(health).returncode != 0:
                assert server.poll() is None, f"the server ended with {server.returncode}"
                assert time.perf_counter() - started < _START_S, "the server is not healthy"
                time.sleep(1)
            print(f"healthy after {time.perf_counter() - started:.1f} s")
            answer = inside(["python", "-c", _ASK]).stdout
            print(f"POST /generate: {answer.strip()}")
            assert json.loads(answer)["generated_text"]
            second = inside(entrypoint)
            print(f"a second start: exit code {second.returncode}, {second.stderr.strip()[-120:]}")
            assert second.returncode == 1
            assert "WebserverFailed" in second.stderr
            assert inside(health).returncode == 0
            subprocess.run(["kill", "-TERM", str(first)], check=True)
            print(f"SIGTERM: exit code {server.wait(_STOP_S)}")
            assert server.returncode == 0
        finally:
            server.kill()


def _only_child(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    while not (found := children.read_text().split()):
        time.sleep(0.05)
    return int(found[0])


def _chroot(root: Path, workdir: str, command: list[str]) -> list[str]:
    chroot = shutil.which("chroot")
    assert chroot is not None
    return [chroot, str(root), "/usr/bin/env", "-C", workdir, *command]


def _copy_to(into: Path, sources: list[Path], target: str) -> None:
    """Copy like COPY, which copies the contents of a folder."""
    ignored = shutil.ignore_patterns("__pycache__")
    for source in sources:
        if source.is_dir():
            shutil.copytree(source, into, symlinks=True, ignore=ignored, dirs_exist_ok=True)
        else:
            folder = into if target.endswith("/") or into.is_dir() else into.parent
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, into)


def _mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


@contextmanager
def _timed(layer: Path, what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    size = sum(path.lstat().st_size for path in layer.rglob("*") if path.is_file())
    print(f"{size / 1e6:9.3f} MB {seconds:6.1f} s  {what[:90]}", flush=True)


def _put_in(root: Path, place: Path, inside: str) -> None:
    """Mount a file or folder of the host, read-only."""
    target = root / inside.lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    if place.is_dir():
        target.mkdir(exist_ok=True)
    else:
        target.touch()
    _mount("--bind", "-o", "ro", place, target)


def _pip_settings() -> tuple[dict[str, str], dict[Path, str]]:
    """Return pip's settings as environment variables, and the host paths that they name with
    their paths inside the image.

    Folders keep their paths, so that links to their contents stay valid. Files get new paths: a
    certificate of the host must not be where the image installs its own.
    """
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, text=True, capture_output=True, check=True).stdout
    env = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.partition(".")
        if section == "global":
            env.setdefault("PIP_" + option.upper().replace("-", "_"), value.strip("'"))
    places: dict[Path, str] = {}
    for name, value in env.items():
        for word in value.split():
            place = Path(urlparse(word).path)
            if word.startswith("file:"):  # an index, with its packages beside it
                place = place.parent
            if place.is_absolute() and place.exists():
                places[place] = str(place) if place.is_dir() else f"/mnt/{place.name}"
                env[name] = env[name].replace(str(place), places[place])
    return env, places


def main() -> None:
    parser = ArgumentParser("in_a_root", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument(
        "--keep", action="store_true", help="keep the layers and print their folder"
    )
    asked = parser.parse_args()
    if inside := os.environ.get(_FOLDER):
        check(Path(inside), dict(argument.split("=", 1) for argument in asked.build_arg))
        return
    missing = [tool for tool in _TOOLS if not shutil.which(tool)]
    if missing or os.geteuid() != 0:
        sys.exit(f"needs root{''.join(f', {tool}' for tool in missing)}")
    folder = tempfile.mkdtemp(prefix="skiff-image-")
    apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    again = [sys.executable, "-m", "tests.image.in_a_root", *sys.argv[1:]]
    try:
        ended = subprocess.run([*apart, *again], env=os.environ | {_FOLDER: folder})
    finally:  # when its namespace is gone, and with it all that was mounted there
        if asked.keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder)
    sys.exit(ended.returncode)


def check(folder: Path, build_args: dict[str, str]) -> None:
    stages = read_stages()
    builder = Builder(folder, build_args)
    image = builder.build(stages)
    with builder.mounted(image, builder.new_folder()) as root:
        serve(root, stages[-1], image)


if __name__ == "__main__":
    main()
