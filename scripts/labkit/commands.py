"""The commands of scripts/lab that use a lab that is up."""

import json
import os
import subprocess

from labkit.hosts import CLIENT, LAB_FILE, PATH, SWITCH, Host, LabError, host_named, ip, lab_hosts


def command_after(arguments: list[str]) -> list[str]:
    command = arguments[1:] if arguments[:1] == ["--"] else arguments
    if not command:
        raise LabError("no command given: put it after --", 2)
    return command


def execute(command: list[str]) -> None:
    environment = {**os.environ, "PATH": PATH}
    os.execvpe(command[0], command, environment)


def run(arguments: list[str]) -> None:
    if not arguments:
        raise LabError("usage: scripts/lab run HOST -- CMD...", 2)
    execute(host_named(arguments[0]).inside(*command_after(arguments[1:])))


def client(arguments: list[str]) -> None:
    lab_hosts()
    execute(["nsenter", f"--net=/run/netns/{CLIENT}", "--", *command_after(arguments)])


def cut(host: Host) -> None:
    ip(f"link set {host.name} down", SWITCH)


def heal(host: Host) -> None:
    ip(f"link set {host.name} up", SWITCH)


def status(arguments: list[str]) -> None:
    if arguments not in ([], ["-o", "json"]):
        raise LabError("usage: scripts/lab status [-o json]", 2)
    hosts = lab_hosts() if LAB_FILE.exists() else []
    rows = [
        {
            "name": host.name,
            "address": host.address,
            "ipv6": host.address6,
            "pid": host.init_pid(),
            "agent_pid": host.agent_pid(),
            "agent": "running" if host.agent_pid() else "stopped",
            "link": "up" if link_is_up(host) else "cut",
            "log": str(host.log),
        }
        for host in hosts
    ]
    if arguments:
        lab_client = {"address": "10.77.0.1", "ipv6": "fd77::1"} if hosts else None
        print(json.dumps({"up": bool(hosts), "client": lab_client, "hosts": rows}, indent=2))
        return
    if not rows:
        print("the lab is not up")
    for row in rows:
        print("{name}  {address}  {ipv6}  agent {agent}  link {link}  log {log}".format(**row))


def link_is_up(host: Host) -> bool:
    show = ["ip", "-n", SWITCH, "-json", "link", "show", host.name]
    done = subprocess.run(show, capture_output=True, text=True, check=False)
    return done.returncode == 0 and "UP" in json.loads(done.stdout)[0]["flags"]
