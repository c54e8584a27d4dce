//go:build integration

package integration

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"testing"

	"github.com/orlop-csi/orlop/tests/harness"
)

// behindRouter is the tests that a driver behind a router passes as well as one
// by itself.
var behindRouter = []func(*testing.T){
	TestCapacityIsExactToTheByte,
	TestAFullPoolTakesNothingMoreAndStaysAsItIs,
	TestWhatWasDeletedCanBeHadAgainAtOnce,
	TestAVolumeCanAlwaysBeFilled,
	TestThickTakesItsBlocksAtOnceAndThinDoesNot,
	TestReserveAndOvercommitDecideWhatIsPromised,
	TestGetCapacityTellsWhatCanBeMade,
	TestADirectorySharesItsFilesystemWithOthers,
	TestWhatTheVolumesOfADirectoryTakeIsNotTakenForThatOfOthers,
	TestASourceInAnotherPoolOfTheNodeIsCopied,

	TestAConflictingCallIsAborted,
	TestOneVolumeCanBeCopiedTwiceAtOnce,
	TestASnapshotMeetsAStagingThatFails,
	TestACopyOutlivesTheDeadlineOfItsCall,

	TestCreateVolumeRefusesAndAltersNothing,
	TestCreateVolumeAnswersWhatItMade,
	TestDeleteVolumeOfWhatIsNotThereIsOK,
	TestDeleteVolumeInUseIsRefusedAndAltersNothing,
	TestCreateSnapshotRefusesAndAltersNothing,
	TestASnapshotIsToldAlikeByAllCalls,
	TestSnapshotsAndCopiesOutliveTheirSources,
	TestControllerExpandVolume,
	TestValidateVolumeCapabilities,
	TestAVolumeThatIsNotThereIsNotFound,
	TestTheCapabilitiesClaimedAreThoseThatAre,

	TestAVolumeWithDamagedMetadataIsLeftAlone,
	TestAVolumeWhoseImageIsDamagedIsToldOf,
	TestMetadataDamagedWhileTheDriverRunsIsToldOf,
	TestADamagedFilesystemIsNotRepairedForAGrowth,

	TestDataOfCopiesInUseBesideTheirSourceIsTheirOwn,
	TestDataCopiesLargerThanTheirSourceSpanTheirVolume,
	TestDataOfABlockVolumeCanBeClonedIntoAFilesystemVolume,
	TestDataPoolWithoutReflinkCopiesVolumesThatAreNotAttached,
	TestDataPoolInADirectoryOfXFSOrBtrfsSharesBlocks,
	TestDataCopiesCanBeOverwrittenInFull,

	TestDataVolumesGrowWhileTheyAreWritten,
	TestDataVolumesOfTheSmallestSizeWork,
	TestDataGrowthOfAnUnusedVolumeShowsAtItsNextStage,
	TestDataGrowthReachesAReadOnlyPublication,

	TestDataCopiesOfAVolumeInUseAreConsistent,

	TestDataIsThereWhenAVolumeIsStagedAgain,
	TestDataThatWasNeverSyncedIsThereAfterUnstage,
	TestDataPathLeaksNothing,

	TestDataVolumesInUseOutliveTheDriver,
	TestDataOfAVolumeStaysWritableWhenTheDriverIsKilledInASnapshot,
	TestDataOfABtrfsStaysWritableWhenTheDriverIsKilledAfterTheCut,
	TestDataFrozenByADriverThatDiedIsThawedAtTheNextStart,
	TestDataFrozenBySomebodyElseStaysFrozen,
	TestDataVolumeWhoseFirstStageWasKilledCanBeStaged,
	TestDataIsThereWhateverNodeCallWasKilled,

	TestDataOfADeletedVolumeIsNeverSeenAgain,
	TestDataDiscardGivesBlocksBackUnlessTheVolumeIsThick,

	TestAHostileNameIsOnlyAName,
	TestANameIsNeverTakenForAnother,
	TestAHostileIDReachesNothing,
	TestALinkPlantedInThePoolIsNotFollowed,

	TestEveryCallAnswersTheSameWhenItIsRepeated,
	TestACallThatACrashCutOffCanBeRepeated,

	TestNodeHealthTellsOfLostData,
	TestNodeVolumeWhoseImageWasRemovedCanBeLeft,
	TestNodeHealthTellsOfAFilesystemThatHasGivenUp,
	TestNodeHealthTellsOfAnImageThatWasReplacedInUse,
	TestNodeHealthTellsOfVolumesWhosePoolHasFailed,
	TestNodeHealthTellsOfALostDevice,
	TestNodeAFailedPoolCanBeLeftAndLeavesOthersAlone,

	TestNodeNeverFormatsACopy,
	TestNodeFormatsACopyOfAnEmptyVolume,

	TestNodeVolumesInUseAreNotTakenAway,
	TestNodeVolumesHeldByAProcessAreNotTakenAway,

	TestPagesMakeUpTheWholeList,
	TestAnEmptyListHasNoToken,
	TestAListIsRightForWhatStaysWhileTheRestChanges,
	TestATokenOutlivesTheEntryThatItNames,
	TestSnapshotsAreListedByVolumeAndByID,

	TestACallInFlightIsFinishedWhenTheDriverEnds,
	TestASnapshotsTimeIsThatOfItsCut,

	TestAGrowthThatACrashCutOffIsCompleted,
	TestAGrowthThatCannotBeRecordedLosesNothing,

	TestChangedBlocksAreNeverMissed,
	TestChangedBlocksOfSpecialPairs,
	TestChangedBlocksOfAThickVolumeAreThoseThatWereWritten,
	TestChangedBlocksCanBeTakenUpAnywhere,
	TestChangedBlocksThatCannotBeTold,
	TestChangedBlocksNeedAPoolThatSharesBlocks,

	TestBadLimitsChangeNothing,
	TestLimitsArePartOfThePublication,

	TestGroupIsRestored,
	TestGroupOfVolumesOfSeveralPoolsOfANode,
	TestGroupOfVolumesThatAreInFlightIsAborted,
	TestGroupOnOneNodeShowsNoWriteWithoutTheEarlierOnes,
}

// byItself is the tests for which a router makes no difference, or that have one
// themselves, by the reason.
var byItself = map[string][]string{
	"it is of the start of one node: no router has a part in it": {
		"TestABadConfigurationStopsTheStart",
		"TestABlankDeviceInThePlaceOfAPoolIsNotFormatted",
		"TestABlankDeviceIsMadeAPoolAndStaysOne",
		"TestACopyOfAPoolIsNotUsedBesideIt",
		"TestADeviceThatIsNotBlankIsNotTouched",
		"TestAFilePoolGrowsWithItsConfigurationAndNeverShrinks",
		"TestAFileThatHasGoneIsNotBegunAnew",
		"TestAPoolBelongsToOneDriver",
		"TestAPoolIsBegunWhereTheConfigurationSaysAnotherPlace",
		"TestAPoolThatHasGoneIsNotBegunAnew",
		"TestAPoolWhoseIdentityIsDamagedIsNotOpened",
		"TestWhatACrashLeftIsGoneAfterTheStart",
		"TestWhatIsNotTheDriversIsLeftAndToldOf",
	},
	"it is of the disks of one node: no router has a part in it": {
		"TestADirectoryWhoseDiskIsFullGivesRoomBack",
		"TestAnImageThatIsCutShortInUseFailsItsUserAlone",
		"TestAnOvercommittedPoolThatItsVolumesFillRecovers",
		"TestAPoolThatCannotBeWrittenHasNoRoom",
		"TestAPoolWhoseFileIsCutShortFailsAlone",
		"TestAReadOnlyDirectoryStopsTheStart",
	},
	"it is of the programs of one node, and of its kernel: no router has a part in it": {
		"TestACheckThatFailsIsToldOf",
		"TestADeviceIsNotFormattedWithoutBlkid",
		"TestAFreezeThatTakesTooLongIsGivenUp",
		"TestAGroupWaitsForAMkfsThatACrashHasLeft",
		"TestAMkfsThatFailsLeavesNothingBehind",
		"TestAPoolWhoseFilesystemCannotBeMadeStopsTheStart",
		"TestAResizeThatFailsIsToldOf",
		"TestAToolThatIsMissingIsNamed",
		"TestAWedgedUnmountHoldsUpNobodyElse",
	},
	"it is of what one process can bear: a router refuses by the same rule": {
		"TestALinkThatComesAndGoesInTheKubeletsDirectoryLeadsNowhere",
		"TestHugeRequestsAreRefused",
		"TestManyCallsForOneNameMakeOneVolume",
		"TestTenThousandCallsInFlightDoNoHarm",
	},
	"its node gets another name; TestAPoolThatMovedToAnotherNodeIsFound is of that behind a router": {
		"TestAPoolMovesWithItsVolumes",
	},
	"it is of the process, and not of calls": {
		"TestACommandLineThatMakesNoSenseIsRefusedInOneLine",
		"TestASocketThatADeadDriverLeftIsReplaced",
		"TestASocketThatIsInUseIsRefused",
		"TestAnAddressForMetricsThatIsTakenStopsTheStart",
		"TestHelpTellsOfEveryFlag",
		"TestTheDriverEndsInGoodOrder",
		"TestTheJSONLogHasOneObjectInEachLine",
		"TestTheMetricsTellWhatTheDriverKnows",
		"TestVersionTellsWhatTheBinaryIs",
	},
	"it takes long; TestManyNodesAreListedInStablePagesAndAskedAtOnceWithinABound is of long lists behind a router": {
		"TestAThousandVolumesInOnePool",
	},
	"to a router, the ID of an inline volume is none: its deletion is done, and touches nothing": {
		"TestNodeInlineVolumeIsNeverAPersistentOne",
	},
	"it has a fleet of its own or needs none": {
		"TestACopyIsAsSparseAsItsSource",
		"TestACopyThatIsCutOffGoesOnWhereItWas",
		"TestACopyThatNobodyAsksForIsDropped",
		"TestAClonesCopyIsOfOneInstant",
		"TestANodesCertificateAloneReadsNothing",
		"TestAVolumeIsRestoredAndClonedOnAnyNode",
		"TestWhatACopyHasBroughtOutlivesTheDriverForAWhile",
		"TestADriverThatTheKubeletRefusesIsNotHealthy",
		"TestANodeServesTheRouterAndNobodyElse",
		"TestChangedBlocksHoldTheirSnapshots",
		"TestGroupAcrossNodesFailsAsAWhole",
		"TestGroupAcrossNodesShowsNoWriteWithoutTheEarlierOnes",
		"TestGroupIsDeletedAsAWholeOnly",
		"TestGroupIsLetGoWhenTheDriverEnds",
		"TestGroupIsMadeOnceAndHasASnapshotOfEachVolume",
		"TestGroupIsUndoneWhen",
		"TestGroupOfABlockVolumeThatIsWrittenOutsideOfPodsIsRefused",
		"TestGroupThatCannotBeWholeIsNotMade",
		"TestGroupThatHasNoRoomIsNotMade",
		"TestGroupThatHoldsNoWriterIsCaught",
		"TestGroupThatIsHeldTooLongIsLetGoAndFails",
		"TestGroupThatLostASnapshotSaysSo",
		"TestLimitsAreChangedThroughTheRouter",
		"TestRouterForwardsChangedBlocks",
		"TestTheDriverRegistersAgain",
		"TestTheKubeletIsServedWhileTheAPIServerCannotBeReached",
		"TestTheRouterDoesNotTakeOneNodeForAnother",
	},
	"it is of calls of the Node service, in front of which there is no router": {
		"TestLimitsHoldAfterARestart",
		"TestLimitsHoldForAReadOnlyPublication",
		"TestLimitsHoldForThePodThatUsesTheVolume",
		"TestNodeCallsCanBeRepeated",
		"TestNodeInlineVolumeCanBeReadOnly",
		"TestNodeInlineVolumeLivesFromPublishToUnpublish",
		"TestNodeInlineVolumeOutlivesTheDriverAndEndsAfterIt",
		"TestNodeInlineVolumeThatFailsLeavesNothing",
		"TestNodeInlineVolumeWithAHostileIDTouchesNothingElse",
		"TestNodeMkfsOptionsAreApplied",
		"TestNodeMkfsThatFailsIsToldAndLeavesNothing",
		"TestNodeMountFlagsAreApplied",
		"TestNodeNeverFormatsWhatIsNotBlank",
		"TestNodeNeverFormatsWhatIsOnItsWayToTheVolume",
		"TestNodePublishAtTheSameTargetWithAnotherReadonlyIsRefused",
		"TestNodePublishCountsWriters",
		"TestNodePublishRefuses",
		"TestNodeReadOnlyIsReadOnlyInTheKernel",
		"TestNodeReaderOnlyModeIsReadOnlyInTheKernel",
		"TestNodeStageOfAStagedVolume",
		"TestNodeStageRefuses",
		"TestNodeStorageHealthTellsOfThePool",
		"TestNodeUnpublishLeavesAloneWhatIsNotItsOwn",
		"TestNodeVolumeStats",
	},
}

// TestRouterPassesTheSuite runs the suite a second time, through a router over
// three nodes. What a test starts is the first of them.
func TestRouterPassesTheSuite(t *testing.T) {
	harness.BehindRouter(t)
	for _, test := range behindRouter {
		t.Run(nameOf(test), test)
	}
}

// A test that is in neither list would silently not be run behind a router.
func TestEachTestIsRunBehindARouterOrSaysWhyNot(t *testing.T) {
	listed := map[string]int{}
	for _, test := range behindRouter {
		listed[nameOf(test)]++
	}
	for _, names := range byItself {
		for _, name := range names {
			listed[name]++
		}
	}
	for _, name := range allTests(t) {
		if listed[name] != 1 {
			t.Errorf("%s is listed %d times; list it once, in behindRouter, or in byItself with the reason", name, listed[name])
		}
		delete(listed, name)
	}
	for name := range listed {
		t.Errorf("%s is listed, and is no test", name)
	}
}

// nameOf is the name of a test.
func nameOf(test func(*testing.T)) string {
	name := runtime.FuncForPC(reflect.ValueOf(test).Pointer()).Name()
	return name[strings.LastIndexByte(name, '.')+1:]
}

// allTests lists the tests of this package, without those that are about the
// router anyway.
func allTests(t *testing.T) (names []string) {
	t.Helper()
	files, err := filepath.Glob("*_test.go")
	if err != nil || len(files) == 0 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, file := range files {
		if strings.HasPrefix(file, "router_") {
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range parsed.Decls {
			if f, ok := d.(*ast.FuncDecl); ok && f.Recv == nil && strings.HasPrefix(f.Name.Name, "Test") && f.Name.Name != "TestMain" {
				names = append(names, f.Name.Name)
			}
		}
	}
	return names
}
