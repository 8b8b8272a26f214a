//! Every `syscall()` of the statically linked libbpf goes through `src/wrap.rs`.
fn main() {
    println!("cargo:rustc-link-arg-bins=-Wl,--wrap=syscall");
    println!("cargo:rerun-if-changed=build.rs");
}
