"""What a run of the tests cost: a pytest plugin that measures and reports it.

At the end of every run: CPU minutes of all processes, peak memory of each
worker, seconds of compilation. `--costs=FILE` writes one JSON line a test. What
a test counts, such as kills, it records as the property `counted`.
"""

import collections
import json
import os
import resource
import time

import jax.monitoring
import pytest

_COMPILE_EVENTS = (
  '/jax/core/compile/jaxpr_trace_duration',
  '/jax/core/compile/jaxpr_to_mlir_module_duration',
  '/jax/core/compile/backend_compile_duration',
)


def _cpu_seconds():
  """User and system seconds of this process and its ended children."""
  usages = map(
    resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
  )
  return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _peak_mib(who):
  return resource.getrusage(who).ru_maxrss / 1024


def _usage(compile_seconds, cpu_seconds):
  return dict(
    cpu_seconds=cpu_seconds,
    peak_mib=_peak_mib(resource.RUSAGE_SELF),
    children_peak_mib=_peak_mib(resource.RUSAGE_CHILDREN),
    compile_seconds=compile_seconds,
  )


class Budget:
  """Measures in workers, and sums and prints in the process that began them."""

  def __init__(self, config):
    self._config = config
    self._compile_seconds = 0.0
    self._usages = {}
    self._costs = []
    self._counted = []
    jax.monitoring.register_event_duration_secs_listener(self._count)

  def _count(self, event, seconds, **_):
    if event in _COMPILE_EVENTS:
      self._compile_seconds += seconds

  @property
  def _is_worker(self):
    return hasattr(self._config, 'workeroutput')

  @pytest.hookimpl(wrapper=True)
  def pytest_runtest_protocol(self, item):
    self._began = _cpu_seconds(), self._compile_seconds
    return (yield)

  @pytest.hookimpl(wrapper=True)
  def pytest_runtest_makereport(self, item, call):
    report = yield
    cpu, compiling = self._began
    cost = (
      _cpu_seconds() - cpu,
      self._compile_seconds - compiling,
      _peak_mib(resource.RUSAGE_SELF),
    )
    self._began = _cpu_seconds(), self._compile_seconds
    report.user_properties = [
      *(pair for pair in report.user_properties if pair[0] != 'cost'),
      ('cost', cost),
    ]
    return report

  def pytest_runtest_logreport(self, report):
    if self._is_worker:
      return
    said = dict(report.user_properties)
    if 'cost' in said:
      self._costs.append((report.nodeid, report.when, *said['cost']))
    if 'counted' in said and report.when == 'call':
      self._counted.append(said['counted'])

  def pytest_sessionfinish(self, session):
    if self._is_worker:
      self._config.workeroutput['usage'] = _usage(
        self._compile_seconds, _cpu_seconds()
      )

  @pytest.hookimpl(optionalhook=True)
  def pytest_testnodedown(self, node, error):
    usage = getattr(node, 'workeroutput', {}).get('usage')
    if usage:
      self._usages[node.gateway.id] = usage

  def pytest_terminal_summary(self, terminalreporter):
    path = self._config.getoption('costs')
    if path:
      self._write(path)
    # Workers speak for themselves: as children they would count twice.
    own = time.process_time() if self._usages else _cpu_seconds()
    usages = {**self._usages, 'main': _usage(self._compile_seconds, own)}
    if self._counted:
      terminalreporter.section('what was counted')
      for text in self._counted:
        terminalreporter.line(text)
    terminalreporter.section('what this run cost')
    total = sum(usage['cpu_seconds'] for usage in usages.values())
    compiling = sum(usage['compile_seconds'] for usage in usages.values())
    terminalreporter.line(
      f'{total / 60:.1f} CPU minutes (user and system, all processes), of '
      f'which about {compiling / 60:.1f} were compilation in the workers'
    )
    for name, usage in usages.items():
      terminalreporter.line(
        f'{name}: peak {usage["peak_mib"]:.0f} MiB, largest process that it '
        f'started {usage["children_peak_mib"]:.0f} MiB'
      )

  def _write(self, path):
    costs = collections.defaultdict(list)
    for name, _, *cost in self._costs:
      costs[name].append(cost)
    with open(path, 'w') as file:
      for name, of_phases in costs.items():
        cpu, compiling, peak = zip(*of_phases)
        line = dict(
          test=name,
          cpu_seconds=sum(cpu),
          compile_seconds=sum(compiling),
          # Of the worker until then.
          peak_mib=max(peak),
        )
        file.write(json.dumps(line) + os.linesep)


def pytest_addoption(parser):
  """Adds `--costs`."""
  parser.addoption('--costs', metavar='FILE', help='what each test cost')


def pytest_configure(config):
  """Starts to measure."""
  config.pluginmanager.register(Budget(config), 'cmd_jax-budget')
