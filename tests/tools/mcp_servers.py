"""Real MCP servers for the tests, in environments of their own: python tests/tools/mcp_servers.py

Makes .cache/mcp-servers/ once (about 40 s): `new` and `old` are virtual environments (servers of the protocol's library
since 2.0, and ones that need a library before it), `node` has the servers from npm. Without npm it makes the rest, and
the tests of those servers are skipped.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2] / ".cache/mcp-servers"
PYTHON = {
    "new": ["mcp==2.3.0", "mcp-server-time==2026.10.19", "mcp-server-git==2026.10.19"],
    "old": ["mcp==1.30.0", "mcp-server-calculator==0.2.1", "mcp-server-sqlite==2025.4.25"],
}
NODE = [f"@modelcontextprotocol/server-{name}@2026.8.31" for name in ("filesystem", "memory", "everything")]
STAMP = ROOT / "made"
NPM_S = 600  # it would try for longer where it cannot reach its registry


def program(name: str) -> str | None:
    """Path of an installed server, None if it is not there."""
    for folder in ("new/bin", "old/bin", "node/node_modules/.bin"):
        path = ROOT / folder / name
        if path.exists():
            return str(path)
    return None


def make() -> None:
    wanted = repr((PYTHON, NODE, sys.version_info[:2], shutil.which("npm") is not None))
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    shutil.rmtree(ROOT, ignore_errors=True)
    ROOT.mkdir(parents=True)
    for name, packages in PYTHON.items():
        subprocess.run([sys.executable, "-m", "venv", ROOT / name], check=True)
        pip = [ROOT / name / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, *packages], check=True)
    if shutil.which("npm") is None:
        print("npm is not there: the tests of MCP servers from npm will be skipped")
    else:
        npm = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", ROOT / "node"]
        try:
            subprocess.run([*npm, *NODE], check=True, timeout=NPM_S)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as e:
            sys.exit(
                f"npm gave no MCP servers for the tests: {e}\n  -> repair npm, or take it off the PATH to go without these tests"
            )
    STAMP.write_text(wanted)


if __name__ == "__main__":
    make()
