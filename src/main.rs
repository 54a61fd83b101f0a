//! The `qbheat` program: reads arguments, calls the library, prints.

mod cli;

use std::process::ExitCode;

use qbheat_kernels::KeepingAllocator;

#[global_allocator]
static MEMORY: KeepingAllocator = KeepingAllocator::new();

fn main() -> ExitCode {
    cli::run()
}
