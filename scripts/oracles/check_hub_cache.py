"""Holds our use of the Hub's cache against the Python package `huggingface_hub` (requirements.txt beside this file).

    check_hub_cache.py METAL_MARLIN MODEL
        serves the folder MODEL (unquantised, with a tokenizer) as a small Hub on this machine, and checks that what the
        package has fetched is used by the program METAL_MARLIN offline, and the other way round
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ID, COMMIT, LARGE = "tiny/model", "c0ffee" * 6 + "c0ff", 1 << 16


class Hub(BaseHTTPRequestHandler):
    """The API of revisions and trees, and `resolve`, as far as the two clients ask."""

    folder = Path(sys.argv[2])
    protocol_version = "HTTP/1.1"

    @classmethod
    @cache
    def files(cls):
        """By name: content, its name in the cache, whether it is a large file."""
        found = {}
        for path in sorted(cls.folder.iterdir()):
            content = path.read_bytes()
            large = len(content) >= LARGE
            blob = b"blob %d\0" % len(content)
            etag = hashlib.sha256(content).hexdigest() if large else hashlib.sha1(blob + content).hexdigest()
            found[path.name] = content, etag, large
        return found

    def do_GET(self):
        path = self.path.split("?")[0]
        if re.fullmatch(f"/api/models/{ID}/revision/(main|{COMMIT})", path):
            siblings = []
            for name, (content, etag, large) in self.files().items():
                lfs = {"sha256": etag, "size": len(content), "pointerSize": 134}
                sibling = {"rfilename": name, "size": len(content), "blobId": "0" * 40 if large else etag}
                siblings.append(sibling | ({"lfs": lfs} if large else {}))
            return self.answer(json.dumps({"id": ID, "sha": COMMIT, "siblings": siblings}).encode())
        if path == f"/api/models/{ID}/tree/{COMMIT}":
            tree = []
            for name, (content, etag, large) in self.files().items():
                lfs = {"oid": etag, "size": len(content), "pointerSize": 134}
                entry = {"type": "file", "path": name, "size": len(content), "oid": "0" * 40 if large else etag}
                tree.append(entry | ({"lfs": lfs} if large else {}))
            return self.answer(json.dumps(tree).encode())
        if found := re.fullmatch(f"/{ID}/resolve/(?:main|{COMMIT})/([^/]+)", path):
            if found[1] in self.files():
                content, etag, large = self.files()[found[1]]
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "X-Linked-Size": str(len(content))}
                return self.answer(content, headers | ({"X-Linked-Etag": f'"{etag}"'} if large else {}))
        self.answer(b"", {"X-Error-Code": "EntryNotFound"}, 404)

    do_HEAD = do_GET

    def answer(self, body, headers={}, status=200):
        size = len(body)
        if (asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))) and status == 200:
            status, start = 206, int(asked[1])
            headers = headers | {"Content-Range": f"bytes {start}-{size - 1}/{size}"}
            body = body[start:]
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def main():
    program = Path(sys.argv[1]).resolve()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    os.environ["HF_HUB_DISABLE_XET"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    # Only now: the package reads its settings when it is imported.
    from huggingface_hub import scan_cache_dir, snapshot_download

    def generate(cache_dir, **variables):
        command = [program, "run", ID, "Once upon a time", "--json", "--temperature", "0", "--max-tokens", "4"]
        environment = os.environ | {"HF_HUB_CACHE": str(cache_dir), "METAL_MARLIN_CACHE": f"{cache_dir}-ours"} | variables
        return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)["tokens"]

    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = Path(folder, "theirs"), Path(folder, "ours")
        snapshot_download(ID, cache_dir=theirs)
        tokens = generate(theirs, HF_HUB_OFFLINE="1")
        print(f"fetched by huggingface_hub: runs offline, {tokens}")

        assert generate(ours) == tokens
        report = scan_cache_dir(ours)
        assert not report.warnings, report.warnings
        (repo,) = report.repos
        (revision,) = repo.revisions
        assert (repo.repo_id, revision.commit_hash, revision.refs) == (ID, COMMIT, {"main"}), revision
        found = Path(snapshot_download(ID, cache_dir=ours, local_files_only=True))
        assert found == revision.snapshot_path
        names = {file.file_name for file in revision.files}
        for name in names:
            assert (found / name).read_bytes() == Hub.files()[name][0], name
            link = os.readlink(theirs / found.relative_to(ours) / name)
            assert os.readlink(found / name) == link, name
        print(f"fetched by metal-marlin: scanned and found by huggingface_hub, {len(names)} files, the same links")

        # The package completes our snapshot without fetching again what is there, and leaves ours as it was.
        before = {file.blob_path: file.blob_last_modified for file in revision.files}
        snapshot_download(ID, cache_dir=ours)
        assert all(os.stat(blob).st_mtime == modified for blob, modified in before.items())
        assert generate(ours, HF_HUB_OFFLINE="1") == tokens
        print("completed by huggingface_hub: nothing was fetched twice")

        for name in ["ours", "theirs"]:
            environment = os.environ | {"HF_HUB_CACHE": f"{folder}/{name}", "METAL_MARLIN_CACHE": f"{folder}/{name}-ours"}
            subprocess.run([program, "cache", "rm", ID, "--yes"], env=environment, check=True, stdout=subprocess.DEVNULL)
            report = scan_cache_dir(Path(folder, name))
            assert not report.repos and not report.warnings, report
        print("removed by metal-marlin: huggingface_hub finds nothing left, and nothing wrong")


main()
