package image

import "testing"

func TestADeviceIsSampledFromEndToEnd(t *testing.T) {
	const whole = 2*blankEnds + blankSamples*blankSample
	for _, size := range []int64{
		whole + 1, whole + 4096, whole + blankSample, 100 << 20, 1 << 30, 1<<30 + 512, 16 << 40, 1 << 62,
	} {
		pieces := blankPieces(size)
		if len(pieces) != 2+blankSamples {
			t.Errorf("%d bytes: %d pieces", size, len(pieces))
		}
		var head, tail bool
		var sum int64
		for _, p := range pieces {
			off, n := p[0], p[1]
			if off < 0 || n <= 0 || off+n > size || off+n < 0 {
				t.Fatalf("%d bytes: piece %d+%d is not in it", size, off, n)
			}
			head = head || off == 0 && n >= 16<<20
			tail = tail || off+n == size && n >= 16<<20
			sum += n
		}
		if !head || !tail {
			t.Errorf("%d bytes: an end is not read: head %v, tail %v", size, head, tail)
		}
		if sum > whole {
			t.Errorf("%d bytes: %d are read", size, sum)
		}
		// No gap between two samples is much larger than another: data that
		// is spread evenly is met.
		for i := 3; i < len(pieces); i++ {
			if step, first := pieces[i][0]-pieces[i-1][0], pieces[3][0]-pieces[2][0]; step != first {
				t.Errorf("%d bytes: sample %d is %d behind the one before, the first ones %d", size, i, step, first)
			}
		}
	}
}

func TestASmallDeviceIsReadWhole(t *testing.T) {
	for _, size := range []int64{0, 1, 512, 4096, blankEnds, 2 * blankEnds, 96 << 20} {
		if pieces := blankPieces(size); len(pieces) != 1 || pieces[0] != [2]int64{0, size} {
			t.Errorf("%d bytes: %v", size, pieces)
		}
	}
}
