"""Pickles that would keep a reader busy, and names that scanners of pickles have missed: refused, and soon."""

import struct
import time

import pytest
from test_pickles import FLOATS, MARK, MORE, P2, TENSOR, archive, call, integer, named, text, watched  # noqa: F401

from sdjax.formats.storage import pickles

SECONDS = 2.0  # of processor time
MANY, TIMES = 200_000, 1000
SET, BYTES = b"c__builtin__\nset\n", b"c_codecs\nencode\n"
ONES = b"](" + b"K\x01" * MANY + b"e"  # a list of equal items, made once
PAIRS = b"](" + b"K\x01K\x01\x86" * MANY + b"e"
ITEMS = b"}(" + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(MANY)) + b"u"
LONG = "x" * (1 << 20)
PARAMETERS = b"ctorch.nn.modules.container\nParameterDict\n"


def again(made, step, times=TIMES):
    """A pickle that makes a value, keeps it as number 0, and repeats a step."""
    return P2 + made + b"q\x00" + step * times + b"."


ONE = (
    TENSOR + b"(" + FLOATS.replace(b"K\x04t", b"M\x00\x40t") + b"K\x00K\x04\x85K\x01\x85\x89" + MORE + b")RtR"
)  # of 16384 numbers the first four


BUSY = {
    "sets of one list": again(ONES, SET + b"h\x00\x85R0"),
    "dicts of one list of pairs": again(PAIRS, MORE + b"h\x00\x85R0"),
    "a dict filled from one dict": again(
        b"}" + text("_parameters") + ITEMS + b"s", PARAMETERS + b")\x81h\x00b0", 100_000
    ),
    "calls with one long tuple": again(
        b"(" + FLOATS + b"K\x00K\x04\x85K\x01\x85" + b"N" * MANY + b"t", TENSOR + b"h\x00R0"
    ),
    "one long key that differs at its end": P2
    + b"}q\x00" + text(LONG + "a") + b"q\x01" + text(LONG + "b") + b"q\x02h\x00"
    + (b"h\x01Nsh\x02Ns") * 100_000 + b".",
    "equal long keys": P2 + text(LONG) + b"q\x01" + text(LONG) + b"q\x02]("
    + b"h\x01h\x02" * 100_000 + b"eq\x03" + (SET + b"h\x03\x85R0") * 5 + b".",
    "bytes of one long text": again(text(LONG), BYTES + b"h\x00" + text("latin1") + b"\x86R0", 100_000),
    "a million marks": P2 + b"(1" * 600_000 + b"N.",
    "nothing, a million times": P2 + b"N" + b"20" * 600_000 + b".",
    "values that are left behind": P2 + b"N" * 2_000_000 + b".",
    "memo upon memo": P2 + b"N" + b"".join(b"r" + struct.pack("<I", i) for i in range(400_000)) + b".",
    "lists upon lists": P2 + b"]" + b"]a" * 400_000 + b".",
    "numbers with far too many digits": P2 + b"I" + b"9" * (1 << 22) + b"\n.",
    "a number of millions of bits": P2 + b"\x8b" + struct.pack("<i", 1 << 22) + b"\x7f" * (1 << 22) + b".",
    "a text of millions of escapes": P2 + b"V" + b"\\u0041" * (1 << 20) + b"\n.",
    "names of a long line": P2 + b"c" + b"a" * (1 << 22) + b"\nb\n.",
    "tuples of tuples": P2 + b"N" + b"\x86".join([b"2"] * 400_000) + b".",
    "floats in words": P2 + b"](" + b"F1e308\n" * 300_000 + b"e.",
    "keys whose low bits are equal": P2 + b"}("
    + b"".join(integer(i << 40) + b"N" for i in range(1 << 16)) + b"u.",
}  # fmt: skip


@pytest.mark.parametrize("name", BUSY)
def test_a_pickle_keeps_no_reader_busy(name, tmp_path):
    path = archive(tmp_path, BUSY[name], {"archive/data/0": bytes(16)})
    begun = time.process_time()
    try:
        pickles.read(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    assert time.process_time() - begun < SECONDS


def test_the_limits_leave_room_for_the_largest_files(tmp_path):
    """As many tensors as Stable Diffusion with its optimizer and averages: 8,000, in two dicts that share them."""
    many = b"".join(text(f"layer.{i}.weight") + ONE for i in range(8000))
    held = pickles.read(archive(tmp_path, P2 + b"}(" + many + b"u.", {"archive/data/0": bytes(4 << 14)}))
    assert len(held) == 8000 and held["layer.7.weight"].shape == (4,)


# Functions of Python's own and of common packages that run code, open files or hosts, and that lists of forbidden names
# lacked when they were reported.  Sources: advisories of picklescan (2025), Fickling's and ModelScan's issues.
MISSED = """
_aix_support._read_cmd_output _osx_support._read_output _osx_support._find_build_tool _pyrepl.pager.pipe_pager
asyncio.base_subprocess.BaseSubprocessTransport._start bdb.Bdb.run bdb.Bdb.runcall bdb.Bdb.runeval
builtins.compile builtins.breakpoint builtins.__import__ builtins.getattr builtins.setattr builtins.globals
cProfile.run cProfile.runctx code.InteractiveInterpreter.runcode codeop.compile_command commands.getoutput
concurrent.futures.ThreadPoolExecutor.submit ctypes.CDLL ctypes.util._findLib_gcc ctypes.WinDLL
distutils.file_util.write_file distutils.spawn.spawn doctest.debug_script doctest.testsource ensurepip._run_pip
faulthandler.enable functools.reduce gc.get_objects http.client.HTTPSConnection
idlelib.autocomplete.AutoComplete.fetch_completions
idlelib.calltip.get_entity idlelib.debugobj.ObjectTreeItem.SetText idlelib.pyshell.ModifiedInterpreter.runcode
imaplib.IMAP4_stream imp.load_source importlib.machinery.SourceFileLoader io.FileIO io.open_code itertools.starmap
lib2to3.pgen2.grammar.Grammar.loads lib2to3.pgen2.pgen.ParserGenerator.make_label linecache.getlines
logging.config.listen logging.config.dictConfig logging.FileHandler mailcap.findmatch marshal.loads
modulefinder.ModuleFinder.run_script multiprocessing.util.spawnv_passfds multiprocessing.managers.BaseManager.start
numpy.f2py.crackfortran.getlincoef numpy.f2py.crackfortran.myeval numpy.distutils.exec_command.exec_command
numpy.core.memmap numpy.fromfile numpy.testing.utils.runstring numpy.load operator.methodcaller operator.itemgetter
os.execv os.popen os.spawnl os.posix_spawn os.startfile os.remove pandas.eval pandas.read_pickle pdb.runeval
pickle._Unpickler.find_class pkgutil.resolve_name platform.popen platform._syscmd_file profile.Profile.run
profile.Profile.runctx pstats.Stats pty.spawn pydoc.pipepager pydoc.tempfilepager pydoc.locate re._compile
requests.get rlcompleter.Completer.attr_matches runpy.run_path sched.scheduler.run shelve.open shutil.move
site.execsitecustomize smtplib.SMTP socket.socket ssl.get_server_certificate subprocess.Popen subprocess.check_call
sys.setprofile tarfile.open tempfile.NamedTemporaryFile test.support.script_helper.assert_python_ok threading.Thread
timeit.repeat timeit.Timer.timeit torch._inductor.codecache.compile_file torch._dynamo.guards.GuardBuilder.get
torch.cuda.memory._run torch.distributed.rpc.rpc_sync
torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression
torch.hub.load torch.jit.load torch.jit.unsupported_tensor_ops.execWrapper torch.jit._script.script
torch.package.PackageImporter torch.serialization.load torch.storage._load_from_bytes
torch.utils._config_module.ConfigModule.load_config
torch.utils.bottleneck.__main__.run_autograd_prof torch.utils.bottleneck.__main__.run_cprofile
torch.utils.collect_env.run torch.utils.cpp_extension.load trace.Trace.run trace.Trace.runctx turtle.config_dict
types.CodeType types.FunctionType unittest.mock._importer urllib.request.urlopen urllib.request.urlretrieve
uuid._get_command_stdout venv.create webbrowser.get wsgiref.simple_server.make_server xml.sax.make_parser
xmlrpc.client.ServerProxy zipfile.ZipFile zipimport.zipimporter _posixsubprocess.fork_exec _winapi.CreateProcess
""".split()


def test_names_that_scanners_have_missed_are_refused(watched):  # noqa: F811
    assert len(MISSED) == len(set(MISSED)) > 130
    for dotted in MISSED:
        module, _, name = dotted.rpartition(".")
        for program in (call(module, name, MARK), named(module, name) + text(MARK) + b"\x85R."):
            with pytest.raises(ValueError, match="not among the names"):
                pickles.read(archive(watched, program))


BROKEN = call("os", "system", MARK)[:-1]  # what runs before a scanner notices that the rest is broken
TRICKS = {
    "an error behind the call": BROKEN + b"\xff.",
    "cut behind the call": BROKEN,
    "a name in a comment of the older protocol": b"(dp0\nS'x'\ncos\nsystem\n(S'touch marked'\ntRs.",
    "a frame that lies": b"\x80\x04\x95" + b"\xff" * 8 + BROKEN[2:] + b".",
    "protocol 99": b"\x80\x63" + BROKEN[2:] + b".",
    "no protocol": BROKEN[2:] + b".",
    "buffers outside": b"\x80\x05\x97.",
    "a byte array": b"\x80\x05\x96" + struct.pack("<Q", 4) + b"data.",
}


@pytest.mark.parametrize("name", TRICKS)
def test_tricks_against_scanners(name, watched):  # noqa: F811
    with pytest.raises(ValueError, match="cannot be read"):
        pickles.read(archive(watched, TRICKS[name]))


def test_a_second_pickle_behind_the_first_never_runs(watched):  # noqa: F811
    assert pickles.read(archive(watched, P2 + b"N." + call("os", "system", MARK))) is None


def test_a_set_is_read_as_it_was_written(tmp_path):
    """The limits refuse no plain value."""
    held = pickles.read(archive(tmp_path, P2 + SET + b"](K\x01K\x02e\x85R."))
    assert held == {1, 2}
