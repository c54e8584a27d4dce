//go:build integration

package crash

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// skipCall makes a thread that has stopped as it enters a system call not make
// it.
func skipCall(tid int) error {
	none := int32(-1)
	const systemCall = 0x404 // NT_ARM_SYSTEM_CALL of linux/elf.h
	vector := unix.Iovec{Base: (*byte)(unsafe.Pointer(&none)), Len: 4}
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SETREGSET, uintptr(tid), systemCall, uintptr(unsafe.Pointer(&vector)), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// lie makes the result of a system call, which a thread has stopped as it leaves,
// an error.
func lie(tid int, errno unix.Errno) error {
	var regs unix.PtraceRegs
	if err := unix.PtraceGetRegs(tid, &regs); err != nil {
		return err
	}
	regs.Regs[0] = -uint64(errno)
	return unix.PtraceSetRegs(tid, &regs)
}
