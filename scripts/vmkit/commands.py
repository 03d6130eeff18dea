"""The commands of scripts/vmlab that use a lab that is up."""

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

from labkit.commands import command_after
from labkit.hosts import LabError, ip
from vmkit.machines import LAB_FILE, SWITCH, Machine, lab_machines, machine_named, on_client


def execute(command: list[str]) -> NoReturn:
    os.execvp(command[0], command)


def run(arguments: list[str]) -> None:
    if not arguments:
        raise LabError("usage: scripts/vmlab run HOST -- CMD...", 2)
    execute(machine_named(arguments[0]).inside(*command_after(arguments[1:])))


def client(arguments: list[str]) -> None:
    lab_machines()
    execute(on_client(*command_after(arguments)))


def cut(machine: Machine) -> None:
    ip(f"link set {machine.name} down", SWITCH)


def heal(machine: Machine) -> None:
    ip(f"link set {machine.name} up", SWITCH)


def power_cut(machine: Machine) -> None:
    from vmkit import build, power

    power.cut(machine)
    build.hang_up(machine)


def boot(machine: Machine, cpu: str = "") -> None:
    from vmkit import power

    power.on(machine, cpu)
    power.wait_until_it_answers(machine)


def update() -> None:
    from vmkit.image import packed_project

    archive = packed_project()

    def bring(machine: Machine) -> None:
        script = "tar -xC /opt/migrator --no-same-owner && systemctl daemon-reload && systemctl restart migrator-agent"
        done = subprocess.run(machine.inside("sh", "-ec", script), input=archive, capture_output=True, check=False)
        if done.returncode != 0:
            raise LabError(f"{machine.name}: {done.stderr.decode(errors='replace').strip()}")

    machines = lab_machines()
    with ThreadPoolExecutor(len(machines)) as pool:
        list(pool.map(bring, machines))


def status(arguments: list[str]) -> None:
    if arguments not in ([], ["-o", "json"]):
        raise LabError("usage: scripts/vmlab status [-o json]", 2)
    machines = lab_machines() if LAB_FILE.exists() else []
    rows = [
        {
            "name": machine.name,
            "suite": machine.suite,
            "address": machine.address,
            "ipv6": machine.address6,
            "power": "on" if machine.pid() else "off",
            "console": str(machine.console),
        }
        for machine in machines
    ]
    if arguments:
        print(json.dumps({"up": bool(machines), "hosts": rows}, indent=2))
        return
    if not rows:
        print("the lab is not up")
    for row in rows:
        print("{name}  {suite}  {address}  {ipv6}  power {power}  console {console}".format(**row))
