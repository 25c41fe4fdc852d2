"""Time, trace and weigh work on a device; used by the benchmarks of all packages."""
