// What newer compilers would ask of glibc beyond 2.28, the one of torch's own wheels.

// libstdc++ 12 reads this flag, of glibc 2.32, to leave out atomics in a program of one thread. The
// library's own flag, hidden like all its symbols, says that there are several.
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;
